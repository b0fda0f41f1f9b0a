"""Publishing: checks, release folder, model card, upload, verification on the Hub, collections and batches of builds.

Reading order: publishable (an artifact or export), release_reports (what must pass), release (the folder), model_card
and export_card, upload, pipeline (all of it), verify (checking a published build).
"""
