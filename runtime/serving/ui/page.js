// What Gradio does not do for the page: a gallery of earlier pictures, downloads, and large views. Pictures are data
// URLs, so all of it happens in the browser.
const ditcKept = 60; // earlier pictures, which take the browser's memory

function ditcKeepPictures() {
  const gallery = document.querySelector(".ditc-earlier");
  for (const figure of [...document.querySelectorAll("#ditc-result .ditc-picture")].reverse())
    gallery.prepend(figure.cloneNode(true));
  while (gallery.childElementCount > ditcKept) gallery.lastElementChild.remove();
}

function ditcDownload(link) {
  const data = atob(link.closest("figure").querySelector("img").src.split(",")[1]);
  const bytes = Uint8Array.from(data, (character) => character.charCodeAt(0));
  const saved = document.createElement("a");
  saved.href = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  saved.download = link.dataset.name;
  saved.click();
  setTimeout(() => URL.revokeObjectURL(saved.href), 60000);
}

function ditcEnlarge(image) {
  const large = document.createElement("div");
  large.className = "ditc-large";
  large.tabIndex = -1;
  large.setAttribute("role", "dialog");
  large.setAttribute("aria-modal", "true");
  large.setAttribute("aria-label", image.alt);
  const picture = document.createElement("img");
  picture.src = image.src;
  picture.alt = image.alt;
  large.append(picture);
  large.addEventListener("click", () => {
    large.remove();
    image.focus();
  });
  document.body.append(large);
  large.focus();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest(".ditc-pictures a");
  const image = event.target.closest(".ditc-picture img");
  if (link) {
    event.preventDefault();
    ditcDownload(link);
  } else if (image) ditcEnlarge(image);
});
document.addEventListener("keydown", (event) => {
  const large = document.querySelector(".ditc-large");
  const presses = event.key === "Enter" || event.key === " ";
  const pressed = presses && event.target.closest(".ditc-pictures a, .ditc-picture img");
  if (large && (presses || event.key === "Escape")) large.click();
  else if (pressed) pressed.click();
  else if (!large || event.key !== "Tab") return;
  event.preventDefault();
});
