import torch, sys
from transformers.models.llama import modeling_llama as M

M.LlamaDecoderLayer.forward = torch.compiler.nested_compile_region(M.LlamaDecoderLayer.forward)
exec(open("/tmp/compile/base.py").read())
