"""The page of `ditc serve --ui`: a form, live previews and a gallery, inside the same application as the API.

gate.py        what of Gradio's application can be reached
page.py        Gradio's components and their events; page.css and page.js belong to it
form.py        what the form offers for a model
draw.py        a request of the form, from its check to its pictures
html.py        what is shown of it
visitors.py    who still looks
"""
