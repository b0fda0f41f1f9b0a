"""Publishing: gates, release folder, upload, verification of what arrived, families and batches of builds."""
