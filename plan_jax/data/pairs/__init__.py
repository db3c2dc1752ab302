"""Reading of a folder of images and reports with a manifest."""
