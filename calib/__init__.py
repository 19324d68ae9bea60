"""Calibrated quantisation: `convert --calib` learns scales and integers from data.

quantizer   the steps, from the data to the integers and the report; what `convert` calls
accuracy    how many answers a quantised model loses, in PyTorch, before a graph is written
decoder     the LLM's weights by GPTQ
gptq        GPTQ itself, for one matrix
encoder/    INT8 weights and activations of the vision encoder
report/     quantization.json and quantization.html
"""
