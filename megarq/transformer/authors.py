"""Reading the RQ-Transformer in the layout of the authors' released checkpoints.

Shapes in their files that differ from ours: positions have a leading 1; query, key and value are three matrices, here
stacked as [3, E, E]; per-depth classifiers are [D, E, K] (in x out), here [D, K, E].
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.errors import CheckpointError
from megarq.transformer.rq_transformer import RQTransformer

_GELU = {"v1": "exact", "v2": "sigmoid"}
_UNSUPPORTED = ("use_padding_emb", "scaled_head_emb_vqvae")
_NAMES = (
    (r"^pos_emb_cond$", "body_input.condition_positions"),
    (r"^pos_emb_hw$", "body_input.positions"),
    (r"^pos_emb_d$", "head_input.positions"),
    (r"^cond_emb\.", "body_input.condition."),
    (r"^input_mlp\.", "body_input.projection."),
    (r"^head_mlp\.", "head_input.projection."),
    (r"^(body|head)_transformer\.blocks\.", r"\1."),
    (r"\.attn\.proj\.", ".attention.output."),
    (r"\.mlp\.0\.", ".mlp.up."),
    (r"\.mlp\.2\.", ".mlp.down."),
    (r"^classifier\.layer_norm\.", "outputs.codes.norm."),
    (r"^classifier\.linear\.", "outputs.codes.linear."),
    (r"^cond_classifier\.layer_norm\.", "outputs.caption.norm."),
    (r"^cond_classifier\.linear\.", "outputs.caption.linear."),
)


def config_from_authors(document: Mapping[str, Any]) -> RQTransformerConfig:
    """Our configuration of their `config.yaml`. Raises CheckpointError for what no model here does."""
    arch = document.get("arch", {})
    if arch.get("type") != "rq-transformer":
        raise CheckpointError(
            f"arch.type={arch.get('type')!r} in config.yaml: expected rq-transformer. "
            "Give the folder of an RQ-Transformer."
        )
    for key in _UNSUPPORTED:
        if arch.get(key):
            raise CheckpointError(f"arch.{key}={arch[key]}: no released model uses it. Import another checkpoint.")
    vocab = arch.get("vocab_size", document.get("dataset", {}).get("vocab_size"))
    missing = [key for key in ("block_size", "embed_dim", "body", "head") if key not in arch]
    if vocab is None or missing:
        raise CheckpointError(
            f"config.yaml lacks arch.{', arch.'.join(missing or ['vocab_size'])}: give the whole file."
        )
    sizes = [vocab] if isinstance(vocab, int) else list(vocab)
    return RQTransformerConfig(
        code_shape=list(arch["block_size"]),
        codebook_size=max(sizes),
        codebook_sizes=sizes if len(set(sizes)) > 1 else None,
        codebook_dim=arch.get("input_embed_dim") or arch["embed_dim"],
        embed_dim=arch["embed_dim"],
        body=_stack(arch["body"]),
        head=_stack(arch["head"]),
        cond_length=max(arch.get("block_size_cond", 0), 1),
        cond_vocab_size=max(arch.get("vocab_size_cond", 0), 1),
        dropout=arch["body"].get("block", {}).get("resid_pdrop", 0.1),
        body_input="codebook" if arch.get("input_emb_vqvae", False) else "learned",
        head_input="codebook" if arch.get("head_emb_vqvae", False) else "learned",
        cumulative_depth=arch.get("cumsum_depth_ctx", False),
        shared_embedding=arch.get("shared_tok_emb", False),
        shared_classifier=arch.get("shared_cls_emb", False),
    )


def _stack(stack: Mapping[str, Any]) -> StackConfig:
    block = stack.get("block", {})
    gelu = block.get("gelu", "v1")
    if gelu not in _GELU:
        raise CheckpointError(f"gelu: {gelu!r} in config.yaml: expected one of {', '.join(_GELU)}.")
    return StackConfig(
        layers=stack.get("n_layer", 0),
        heads=block.get("n_head", 1),
        gelu=_GELU[gelu],
        attention_bias=block.get("attn_bias", True),
        mlp_bias=block.get("mlp_bias", True),
    )


def state_from_authors(state: Mapping[str, Tensor], config: RQTransformerConfig) -> dict[str, Tensor]:
    """Our state dict, fp32, of theirs. Raises CheckpointError naming what is missing, unknown or of another shape."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*)\.attn\.(query|key|value)\.(weight|bias)", _rename(name)):
            prefix, part, kind = match.groups()
            parts.setdefault(f"{prefix}.attention.qkv.{kind}", {})[part] = tensor
        elif name == "tok_emb.offsets":
            continue
        elif name == "tok_emb.weight":
            sides = {"body_input": config.body_input, "head_input": config.head_input}
            ours |= {f"{side}.codes.weight": tensor for side, source in sides.items() if source == "learned"}
        elif name.startswith("pos_emb_"):
            ours[_rename(name)] = tensor.squeeze(0)
        elif name == "classifier.linear.weight" and tensor.ndim == 3:
            ours[_rename(name)] = tensor.transpose(1, 2)
        else:
            ours[_rename(name)] = tensor
    for name, three in parts.items():
        if len(three) == 3:
            ours[name] = torch.stack([three["query"], three["key"], three["value"]])
    ours = {name: tensor.float().contiguous() for name, tensor in ours.items()}
    _check(ours, config)
    return ours


def _rename(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check(state: Mapping[str, Tensor], config: RQTransformerConfig) -> None:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in RQTransformer(config).state_dict().items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
    problems += [f"unknown {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(expected[name])}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            "model.pt does not hold the RQ-Transformer that its config.yaml describes: "
            f"{'; '.join(problems[:5])}{more}. "
            "Give the two files of one release."
        )
