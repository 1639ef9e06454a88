"""The style of the HTML report: one string, so that the page needs no other file."""

CSS = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#15181d;--soft:#5b6472;--line:#e3e6eb;--good:#12805c;--good-bg:#e3f5ee;--bad:#c0272d;
--bad-bg:#fdeaea;--skip:#8a6100;--skip-bg:#fdf3d7;--a:#2f6fed;--b:#e0732c;--c:#12805c;--d:#9b3fc4;
--e:#8a6d00;--track:#eceef2}
@media(prefers-color-scheme:dark){:root{--bg:#0f1216;--card:#171b21;--ink:#e9edf3;--soft:#9aa5b4;--line:#272d36;
--good:#4fd1a1;--good-bg:#11382c;--bad:#ff7b7b;--bad-bg:#431c1f;--skip:#f0c75e;--skip-bg:#3a2f10;--a:#6ea0ff;--b:#ff9d5c;
--c:#4fd1a1;--d:#d08cf0;--e:#d9bf5a;--track:#232932}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:28px;letter-spacing:-.02em;margin:0 0 4px}h2{font-size:18px;margin:0 0 4px;letter-spacing:-.01em}
p{margin:0 0 12px}.soft{color:var(--soft)}.small{font-size:13px}code,.num{font-family:ui-monospace,SFMono-Regular,Menlo,
Consolas,monospace;font-size:13px;font-variant-numeric:tabular-nums}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:22px 24px;margin-top:18px}
.hero{display:flex;gap:20px;align-items:center;justify-content:space-between;flex-wrap:wrap}
.verdict{font-size:20px;font-weight:650;border-radius:12px;padding:12px 22px;white-space:nowrap}
.pass{color:var(--good);background:var(--good-bg)}.fail{color:var(--bad);background:var(--bad-bg)}
.not{color:var(--skip);background:var(--skip-bg)}
.chip{display:inline-block;border-radius:99px;padding:1px 10px;font-size:12.5px;font-weight:600;white-space:nowrap}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th{text-align:left;font-size:12px;font-weight:600;color:var(--soft);text-transform:uppercase;letter-spacing:.04em}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}td.num,th.num{text-align:right;white-space:nowrap;padding-right:16px}
.bar{height:8px;border-radius:4px;background:var(--track);min-width:150px;margin-top:7px;overflow:hidden}
.bar i{display:block;height:100%;border-radius:4px;background:var(--a)}.bar i.hot{background:var(--bad)}
.pictures{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:14px;margin:10px 0 22px}
figure{margin:0}figure img{width:100%;border-radius:10px;border:1px solid var(--line);display:block;background:#000;
image-rendering:auto}figcaption{font-size:13px;color:var(--soft);margin-top:6px}
.story{border-left:3px solid var(--bad);padding:2px 0 2px 16px;margin:14px 0}
.legend{display:flex;gap:18px;flex-wrap:wrap;font-size:13px;color:var(--soft);margin-top:6px}
.legend b{display:inline-block;width:18px;height:3px;border-radius:2px;margin-right:7px;vertical-align:middle}
svg{display:block;width:100%;height:auto;margin-top:8px}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.grid{stroke:var(--line)}.bound{stroke:var(--bad);stroke-dasharray:6 5}
details summary{cursor:pointer;color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:640px){main{padding:16px 12px}.pictures{grid-template-columns:1fr}section{padding:16px}}
"""
