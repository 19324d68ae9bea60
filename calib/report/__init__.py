"""The report of a calibrated conversion, `quantization.json` and `quantization.html`: its document, the page, and the drawing."""
