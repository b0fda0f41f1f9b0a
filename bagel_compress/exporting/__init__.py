"""Export: BAGEL as ONNX graphs, one per block, for ONNX Runtime and TensorRT.

Reading order: blocks (what is exported), graph (torch -> one ONNX template per kind of block), weights (where values
come from), forms (how a compressed matrix is carried), build (templates and values -> folder), manifest (what the
folder is), ort_* (the sampler on ONNX Runtime; none of these imports torch), tensorrt (engines).
"""
