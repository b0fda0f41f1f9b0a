"""Export: BAGEL as ONNX graphs, one per block, for ONNX Runtime and TensorRT.

Reading order: blocks (what is exported), graph (torch -> one ONNX template per kind of block), source (where values
come from), onnx_weights (how a compressed matrix is carried), write and build (templates and values -> folder),
manifest (what the folder is), ort_* (the sampler on ONNX Runtime; none of these imports torch), tensorrt (engines).
"""
