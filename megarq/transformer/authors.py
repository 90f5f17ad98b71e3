"""Reading and writing the RQ-Transformer in the layout of the authors' released checkpoints.

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
_DROPOUT = 0.1
"""Their dropout where config.yaml is silent."""
_TABLES = ("body_input.codes.weight", "head_input.codes.weight")
_UNSUPPORTED = ("use_padding_emb", "scaled_head_emb_vqvae")
_BEGINNINGS = {
    "pos_emb_cond": "body_input.condition_positions",
    "pos_emb_hw": "body_input.positions",
    "pos_emb_d": "head_input.positions",
    "cond_emb.": "body_input.condition.",
    "input_mlp.": "body_input.projection.",
    "head_mlp.": "head_input.projection.",
    "body_transformer.blocks.": "body.",
    "head_transformer.blocks.": "head.",
    "classifier.layer_norm.": "outputs.codes.norm.",
    "classifier.linear.": "outputs.codes.linear.",
    "cond_classifier.layer_norm.": "outputs.caption.norm.",
    "cond_classifier.linear.": "outputs.caption.linear.",
}
_MIDDLES = {".attn.proj.": ".attention.output.", ".mlp.0.": ".mlp.up.", ".mlp.2.": ".mlp.down."}


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
        dropout=arch["body"].get("block", {}).get("resid_pdrop", _DROPOUT),
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


def config_to_authors(config: RQTransformerConfig) -> dict[str, Any]:
    """Their config.yaml of our configuration; of a block, keys that have their defaults are left out."""
    sizes = config.codebook_size if config.codebook_sizes is None else list(config.codebook_sizes)
    arch = {
        "type": "rq-transformer",
        "block_size": list(config.code_shape),
        "vocab_size": sizes,
        "embed_dim": config.embed_dim,
        "input_embed_dim": config.codebook_dim,
        "shared_tok_emb": config.shared_embedding,
        "shared_cls_emb": config.shared_classifier,
        "input_emb_vqvae": config.body_input == "codebook",
        "head_emb_vqvae": config.head_input == "codebook",
        "cumsum_depth_ctx": config.cumulative_depth,
        "vocab_size_cond": config.cond_vocab_size,
        "block_size_cond": config.cond_length,
        "body": _stack_to_authors(config.body, config.dropout),
        "head": _stack_to_authors(config.head, config.dropout),
    }
    return {"dataset": {"vocab_size": sizes}, "arch": arch}


def _stack_to_authors(stack: StackConfig, dropout: float) -> dict[str, Any]:
    block: dict[str, Any] = {"n_head": stack.heads}
    if stack.gelu != "exact":
        block["gelu"] = next(theirs for theirs, ours in _GELU.items() if ours == stack.gelu)
    for key, value in (("attn_bias", stack.attention_bias), ("mlp_bias", stack.mlp_bias)):
        block |= {} if value else {key: False}
    if dropout != _DROPOUT:
        block["resid_pdrop"] = dropout
    return {"n_layer": stack.layers, "block": block}


def state_to_authors(state: Mapping[str, Tensor], config: RQTransformerConfig) -> dict[str, Tensor]:
    """Their state dict of our parameters."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attention.qkv." in name:
            prefix, kind = _rename_back(name).split(".attention.qkv.")
            parts = zip(("query", "key", "value"), tensor, strict=True)
            theirs |= {f"{prefix}.attn.{part}.{kind}": values.contiguous() for part, values in parts}
        elif name in _TABLES:
            theirs["tok_emb.weight"] = tensor  # where both sides learn, they share one table
        elif name.endswith("positions"):
            theirs[_rename_back(name)] = tensor.unsqueeze(0)
        elif name == "outputs.codes.linear.weight" and tensor.ndim == 3:
            theirs[_rename_back(name)] = tensor.transpose(1, 2).contiguous()
        else:
            theirs[_rename_back(name)] = tensor
    if "tok_emb.weight" in theirs and not config.shared_embedding:
        theirs["tok_emb.offsets"] = torch.tensor([sum(config.sizes[:depth]) for depth in range(config.depth)])
    return theirs


def _rename(name: str) -> str:
    """Our name of theirs."""
    return _replace(name, _BEGINNINGS, _MIDDLES)


def _rename_back(name: str) -> str:
    """Their name of ours."""
    return _replace(name, *({ours: theirs for theirs, ours in names.items()} for names in (_BEGINNINGS, _MIDDLES)))


def _replace(name: str, beginnings: Mapping[str, str], middles: Mapping[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in middles.items():
        name = name.replace(old, new)
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
