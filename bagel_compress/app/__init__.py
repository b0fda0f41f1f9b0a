"""The web page: drawing, editing, asking, and two builds side by side, in a browser.

Reading order: `settings` (every control: range and default), `texts` (every word, in every language), `uploads` (what
a visitor may send), `session` (the models, and a run that tells how far it is), `model_info`, `page` (the controls and
what they start).
"""
