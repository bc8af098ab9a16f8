"""Networks that draft blocks for a target of a few tokens, with random weights; and what they compute, heard or written out."""

import torch
from small_drafters import editing
from tiny_models import build
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

import specdec
from specdec import Sampling
from specdec.drafters import Drafter
from specdec.drafters.block_files import BlockReading
from specdec.drafters.dflash import DFlashNet
from specdec.drafters.dspark import DSparkNet
from specdec.testing import exact_law, target_law

NORMS = 1e-5  # norms and softmax compute in float32
LLAMA_TV = 1e-12  # float64 logits of one text differ by 1e-15 between batch shapes
ONE, PROMPTS = Sampling(1.0), [torch.tensor([0, 1, 0]), torch.tensor([2]), torch.tensor([3, 1, 1, 0, 2])]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def target(vocab=4, **changes):
    sizes = {**SIZES, "vocab_size": vocab, "num_hidden_layers": 3, "eos_token_id": None}
    return build("Llama", torch.float64, **{**sizes, **changes})


def drawn(net):
    """A network with weights so large that every part matters."""
    generator = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        p.data.normal_(float(p.dim() == 1 and "norm" in name), 0.5, generator=generator)
    return net.double().eval()


def config(layers=2, **changes):
    return LlamaConfig(**{**SIZES, "num_hidden_layers": layers, "vocab_size": 4, **changes})


def dflash(slots=3, states=(0, 2), of=None, **options):
    return drawn(DFlashNet(config(**(of or {})), states, 16, slots, 3, **options))


def dspark(slots=2, states=(1, -1), from_anchor=True, drafted=None, **options):
    reading, parts = BlockReading(from_anchor), (config(), states, 16, slots, 3, drafted)
    names = dict(zip(("config", "states", "state_size", "slots", "mask_token", "vocab"), parts, strict=True))
    return drawn(DSparkNet(tokens=4, rank=3, reading=reading, **names, **options))


def unsure(net):
    """A network whose confidence is now above, now below a half."""
    net.confidence_head.proj.weight.data.normal_(0, 2.5, generator=torch.Generator().manual_seed(2))
    net.confidence_head.proj.bias.data.zero_()
    return net


def reduced(net):
    """A network that drafts the tokens 0, 2 and 3 alone."""
    net.target_ids = torch.tensor([0, 2, 3])
    return net


def distance(drafter, sampling=ONE, prompt=(0, 1, 0), **options):
    options = {"sampling": sampling, "max_new_tokens": 3, **options}
    return float(
        exact_law(target(), prompt, drafter, **options).total_variation(target_law(target(), prompt, **options))
    )


class Noting(Drafter):
    """Another drafter, whose trees it notes."""

    def __init__(self, inner):
        self.inner, self.trees = inner, []
        self.states, self.models, self.capturable = inner.states, inner.models, inner.capturable

    def spec(self, sampling):
        return self.inner.spec(sampling)

    def start(self, target, batch, last=None):
        return editing(self.inner.start(target, batch, last), self.note)

    def note(self, tree):
        self.trees.append(tree)
        return tree


def drafts(drafter, prompts=PROMPTS, **options):
    """(tokens, laws) of all drafts of a run."""
    noting, options = Noting(drafter), {"sampling": ONE, "max_new_tokens": 5, "stop_tokens": (), **options}
    specdec.generate(target(), prompts, noting, **options)
    return [(tree.tokens, tree.draft_probs) for tree in noting.trees if tree.draft_probs is not None]


def heard(net):
    """A list to which the network adds what it computes of each block."""
    found, block = [], net.block
    net.block = lambda *parts: found.append(block(*parts)) or found[-1]
    return found


def plain_block(net, model, text):
    """[depth, vocab]: logits of the block after a text [length], by attention over a dense mask and without a cache."""
    states = model(text[None], output_hidden_states=True).hidden_states
    context = net.hidden_norm(net.fc(torch.cat([states[i] for i in net.states], -1)))[:, :-1]
    tokens = torch.cat([text[-1:], torch.full((net.slots - 1,), net.mask_token)])
    x, root = model.get_input_embeddings()(tokens)[None], len(text) - 1
    place = torch.arange(root + net.slots)
    rope = net.rotary(x, place[None])
    early, late = (tuple(part[:, some] for part in rope) for some in (slice(root), slice(root, None)))
    for layer in net.layers:
        attention, y = layer.self_attn, layer.input_layernorm(x)
        key = torch.cat([attention.keys(context, early), attention.keys(y, late)], 2)
        value = torch.cat([attention.values(context), attention.values(y)], 2)
        far = place[root:, None] - place
        seen = (far < (layer.window or 99)) & ((far >= 0) | (not layer.causal))
        found = scaled_dot_product_attention(attention.queries(y, late), key, value, seen, enable_gqa=True)
        x = x + attention.o_proj(found.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(net.norm(x))[0, net.slots - net.depth :]
