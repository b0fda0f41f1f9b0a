"""ComfyUI nodes for builds of every format and for full-precision checkpoints.

`bagel-compress comfyui install DIR` puts a stub into ComfyUI's `custom_nodes` that takes its two mappings from here.
Nodes that ComfyUI-BAGEL has are there under its names too, where that package has not registered them itself, so that
workflows made with it open. ComfyUI's own modules are imported inside the functions that need them.
"""

from bagel_compress.comfyui.nodes import display_names, node_classes

NODE_CLASS_MAPPINGS = node_classes()
NODE_DISPLAY_NAME_MAPPINGS = display_names(NODE_CLASS_MAPPINGS)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
