"""W8A8 quantisation of the vision encoder, one step a module:

chain            the encoder and projector as a sequence of units, copied and folded as the graph computes them
histogram        histograms of a layer's inputs, and the clip value that loses least
quantize_layer   one layer: equalise its channels, choose its integers and correct its bias
rounding         the arithmetic below that: scales, rounding to nearest and GPTQ
cache            files that hold activations between units, and what was observed, for the next conversion
search           which units compute in INT8: observe, measure, choose
"""
