"""The report of a calibrated conversion.

document   its content as dataclasses
page       the content as one HTML page
drawing    the page's tables and SVG pictures
write      both files, in the model directory
"""
