"""A drafter on the target's states: a layer reads each token beside the state before it, and in drafts its own output there."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.drafters import FeatureDrafter, FeatureNet
from specdec.drafters.layers import MLP, Attention, Norm, Rotary
from specdec.testing import assert_drafter
from specdec.trees import Widths


class Mixed(FeatureNet):
    """What the first layer and the LM head read, mixed with the token, in one layer of the target's shape."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.states, self.state_size, self.kept = (1, -1), hidden, hidden
        self.attention = [(config.num_key_value_heads, hidden // config.num_attention_heads)]
        self.mix, self.join = nn.Linear(2 * hidden, hidden), nn.Linear(2 * hidden, hidden)
        self.attend, self.mlp, self.rotary = Attention(config, layer=0), MLP(config), Rotary(config)
        self.norm = Norm(hidden, config.rms_norm_eps)

    def project(self, states):  # [batch, n, 2, hidden] of the target -> [batch, n, hidden]
        return self.mix(states.flatten(2))

    def step(self, tokens, features, level, target):  # what the level's nodes see, it knows
        x = self.join(torch.cat([target.embed(tokens), features], -1))
        x = x + self.attend(self.norm(x), self.rotary(x, level.positions), level)
        return x + self.mlp(x)

    def logits(self, outputs, target):
        return target.logits(outputs)


config = LlamaConfig(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(config).double().eval()
net = Mixed(model.config).double().eval()
assert_drafter(FeatureDrafter(net, Widths([2, 1])), model, [(0, 1, 0), (2,)])
