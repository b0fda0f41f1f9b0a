"""The web page: drawing, editing, asking, and two builds side by side, in a browser.

Reading order: `settings` (every control: range and default), `texts` and `languages` (every word), `uploads` (what a
visitor may send), `session` (the models, and a run that tells how far it is), `advice` (which build fits a GPU),
`runs` (what a click starts), `controls` (the widgets), `model_info`, `page` (the tabs, and which click starts what).
"""
