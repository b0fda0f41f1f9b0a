"""Export: BAGEL as ONNX graphs, one per block of the model, for ONNX Runtime and TensorRT.

Reading order: blocks (the torch modules that are exported), graph (torch -> one ONNX template per kind of block),
source (where the weights come from), onnx_weights (how a graph stores and decodes a compressed matrix), write and build
(templates and weights -> folder), manifest (contents of the folder), ort_* (the sampler on ONNX Runtime; none of these
imports torch), tensorrt (engines).
"""
