"""Tiny, random-weight versions of real models, exactly as transformers and diffusers ship them.

Every entry of :data:`ZOO` is callable and returns ``(model, args, kwargs, dynamic_shapes)``:

* ``model`` is in eval mode, float32, and reproducible (seeded).
* ``args`` and ``kwargs`` call it the way its users do, including non-tensor keyword arguments.
* ``dynamic_shapes`` maps an argument name to ``{axis: "dim name"}``; ``"2*rows"`` means that the
  axis is always twice the free dimension ``rows``. Nested arguments hold nested specs.

``ZOO[name].inputs(seed=..., batch=3, ...)`` draws fresh inputs, at other sizes if asked.

Plain random initialisation hides errors: zero-initialised gates switch whole branches off, and
near-zero attention logits make every softmax uniform. :func:`sharpen` removes both effects, and
:func:`dead_tensors` lists the parameters and inputs that an output still does not depend on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
DynamicShapes = dict[str, Any]
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any], DynamicShapes]
Sizes = Mapping[str, int]

VOCAB = 128
TEXT_WIDTH = 16
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class ZooEntry:
    """One model: how to build it, how to call it, and which of its sizes are free.

    ``sizes`` are the captured sizes; ``second`` changes some of the free ones.
    ``static_note`` says why an axis that looks free is not.
    """

    name: str
    build: Callable[[], nn.Module]
    make_inputs: Callable[[Sizes], Inputs]
    sizes: dict[str, int]
    second: dict[str, int]
    dynamic_shapes: DynamicShapes
    query_key_gain: float = 2.0
    static_note: str = ""

    def __call__(self) -> Case:
        args, kwargs = self.inputs(seed=0)
        return self.model(), args, kwargs, self.dynamic_shapes

    def model(self, seed: int = 0) -> nn.Module:
        """The model alone, with sharpened weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return sharpen(self.build().eval(), query_key_gain=self.query_key_gain)

    def inputs(self, seed: int = 1, **sizes: int) -> Inputs:
        """Fresh random inputs at the captured sizes, or at ``sizes`` where given."""
        unknown = sorted(set(sizes) - set(self.sizes))
        if unknown:
            raise KeyError(f"{self.name} has no size named {unknown}; it has {sorted(self.sizes)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_inputs({**self.sizes, **sizes})

    def second_inputs(self, seed: int = 2) -> Inputs:
        """Fresh random inputs at the entry's second size."""
        return self.inputs(seed=seed, **self.second)


ZOO: dict[str, ZooEntry] = {}


def _register(entry: ZooEntry) -> None:
    ZOO[entry.name] = entry


# --- Making outputs depend on everything ----------------------------------------------------------

_QUERY_OR_KEY = re.compile(r"(^|\.)(add_)?(to_)?(q|k|query|key)(_proj)?\.weight$")
_QUERY_KEY_NORM = re.compile(r"(^|\.)(norm_(added_)?[qk]|[qk]_norm)\.weight$")
_FUSED_QKV = re.compile(r"(^|\.)c_attn\.weight$")


@torch.no_grad()
def sharpen(model: nn.Module, query_key_gain: float = 2.0, noise: float = 0.2) -> nn.Module:
    """Change the weights of ``model`` in place so that numerical errors cannot hide.

    Parameters that start constant (zero gates, unit norm scales, zero biases) get noise, matrices
    are rescaled to keep the variance of their input, and query/key projections (or the norms after
    them) are scaled up until attention is far from uniform. Default transformers initialisation
    gives query and key weights a deviation of 0.02, so at these widths this raises them 10-20x.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter) * noise)
        elif parameter.dim() >= 2 and not _is_table(name):
            fan_in = _fan_in(model, name, parameter)
            parameter.mul_((fan_in * parameter.square().mean()).rsqrt())
        if _QUERY_OR_KEY.search(name) or _QUERY_KEY_NORM.search(name):
            parameter.mul_(query_key_gain)
        elif _FUSED_QKV.search(name):
            parameter[:, : 2 * parameter.shape[1] // 3].mul_(query_key_gain)
    return model


def _is_table(name: str) -> bool:
    """True for learned additive tables, which have no fan-in to normalise by."""
    return bool(re.search(r"table|token|position|pos_", name)) and "proj" not in name


def _fan_in(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        return 1
    if type(owner).__name__ == "Conv1D":  # GPT-2 stores matrices as [in, out]
        return parameter.shape[0]
    if parameter.dim() == 3:  # stacked experts, [expert, out, in]
        return parameter.shape[-1]
    return parameter[0].numel()


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside nested tuples, lists and dicts, with a readable path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}[{index}]")


@torch.no_grad()
def dead_tensors(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], threshold: float = 1e-3
) -> list[str]:
    """Names of parameters and inputs that can be perturbed without moving the output.

    An output moves when it changes by more than ``threshold`` of its largest magnitude. The
    perturbation is 30% of a tensor's own deviation (integers: neighbouring elements swapped).
    """
    reference = _flat_output(model(*args, **kwargs))
    scale = reference.abs().max()
    candidates = [*model.named_parameters(), *tensors_of((args, kwargs))]
    dead = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        for name, tensor in candidates:
            saved = tensor.detach().clone()
            tensor.copy_(_perturbed(saved))
            changed = _flat_output(model(*args, **kwargs))
            tensor.copy_(saved)
            if (changed - reference).abs().max() <= threshold * scale:
                dead.append(name)
    return dead


def _perturbed(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor + 0.3 * torch.randn_like(tensor) * (tensor.square().mean().sqrt() + 0.1)
    return tensor.roll(1, dims=-1) if tensor.numel() > 1 else tensor + 1


def _flat_output(output: Any) -> Tensor:
    leaves = output.to_tuple() if hasattr(output, "to_tuple") else output
    return torch.cat([tensor.float().flatten() for _, tensor in tensors_of(leaves)])


# --- Language models ------------------------------------------------------------------------------

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_TOKENS_AND_MASK: DynamicShapes = {
    "input_ids": {0: "batch", 1: "seq"},
    "attention_mask": {0: "batch", 1: "seq"},
}


def _token_inputs(sizes: Sizes) -> Inputs:
    """Token ids with the first row padded on the left, as for generation, and no cache."""
    batch, seq = sizes["batch"], sizes["seq"]
    return (), {
        "input_ids": torch.randint(0, VOCAB, (batch, seq)),
        "attention_mask": _right_padded(batch, seq).flip(1),
        "use_cache": False,
    }


def _right_padded(batch: int, length: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A mask of ones whose first row ends in two padding positions."""
    mask = torch.ones(batch, length, dtype=dtype)
    mask[0, -2:] = 0
    return mask


def _language_model(name: str, build: Callable[[], nn.Module], **changes: Any) -> None:
    settings: dict[str, Any] = {
        "make_inputs": _token_inputs,
        "sizes": {"batch": 2, "seq": 8},
        "second": {"batch": 3, "seq": 13},
        "dynamic_shapes": _TOKENS_AND_MASK,
    }
    _register(ZooEntry(name=name, build=build, **{**settings, **changes}))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_TEXT, head_dim=8))


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_TEXT, head_dim=8, sliding_window=4))


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=4, layer_types=layers)
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def _qwen2vl_text() -> nn.Module:
    """The text tower of Qwen2-VL, whose multimodal rotary embedding takes three position rows."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    config = Qwen2VLConfig(text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config).model.language_model


def _qwen2vl_text_inputs(sizes: Sizes) -> Inputs:
    batch, seq = sizes["batch"], sizes["seq"]
    return (), {
        "inputs_embeds": torch.randn(batch, seq, _TEXT["hidden_size"]),
        "attention_mask": _right_padded(batch, seq).flip(1),
        "position_ids": torch.randint(0, 32, (3, batch, seq)).sort(dim=-1).values,
        "use_cache": False,
    }


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    )


def _qwen3moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_TEXT, head_dim=8, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3
    )
    return Qwen3MoeForCausalLM(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def _bert_inputs(sizes: Sizes) -> Inputs:
    batch, seq = sizes["batch"], sizes["seq"]
    return (), {
        "input_ids": torch.randint(0, VOCAB, (batch, seq)),
        "attention_mask": _right_padded(batch, seq),
        "token_type_ids": torch.randint(0, 2, (batch, seq)),
    }


_language_model("llama", _llama)
_language_model("qwen3", _qwen3)
_language_model("gemma2", _gemma2)
_language_model("gemma3", _gemma3)
_language_model("gpt2", _gpt2)
_language_model(
    "qwen2vl_text",
    _qwen2vl_text,
    make_inputs=_qwen2vl_text_inputs,
    dynamic_shapes={
        "inputs_embeds": {0: "batch", 1: "seq"},
        "attention_mask": {0: "batch", 1: "seq"},
        "position_ids": {1: "batch", 2: "seq"},
    },
)
_language_model("mixtral", _mixtral)
_language_model("qwen3moe", _qwen3moe)
_language_model(
    "bert",
    _bert,
    make_inputs=_bert_inputs,
    dynamic_shapes={**_TOKENS_AND_MASK, "token_type_ids": {0: "batch", 1: "seq"}},
)


# --- Image encoders -------------------------------------------------------------------------------

_IMAGE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_IMAGE, intermediate_size=64))


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**_IMAGE, mlp_ratio=2))


def _image_inputs(sizes: Sizes) -> Inputs:
    shape = (sizes["batch"], 3, 4 * sizes["rows"], 4 * sizes["columns"])
    return (), {"pixel_values": torch.randn(shape)}


_register(
    ZooEntry(
        name="vit",
        build=_vit,
        make_inputs=_image_inputs,
        sizes={"batch": 2, "rows": 4, "columns": 4},
        second={"batch": 5},
        dynamic_shapes={"pixel_values": {0: "batch"}},
        static_note="image size: ViT checks it, unless called with interpolate_pos_encoding=True",
    )
)
_register(
    ZooEntry(
        name="dinov2",
        build=_dinov2,
        make_inputs=_image_inputs,
        sizes={"batch": 2, "rows": 5, "columns": 6},
        second={"batch": 3, "rows": 8, "columns": 7},
        dynamic_shapes={"pixel_values": {0: "batch", 2: "4*rows", 3: "4*columns"}},
        static_note="image size: free only when captured at another size than the config's",
    )
)


# --- Video diffusion transformers -----------------------------------------------------------------

_VIDEO_SIZES = {"batch": 2, "text": 6, "frames": 4, "rows": 4, "columns": 4}
_VIDEO_SECOND = {"batch": 3, "text": 9, "frames": 5, "rows": 3, "columns": 6}
_LATENT = {0: "batch", 2: "frames", 3: "2*rows", 4: "2*columns"}
_TEXT_TOKENS = {0: "batch", 1: "text"}
_PER_ITEM = {0: "batch"}


def _latent(sizes: Sizes, channels: int = LATENT_CHANNELS) -> Tensor:
    """A video latent [batch, channels, frames, height, width], two latent pixels per patch."""
    shape = (sizes["batch"], channels, sizes["frames"], 2 * sizes["rows"], 2 * sizes["columns"])
    return torch.randn(shape)


def _timestep(sizes: Sizes) -> Tensor:
    return torch.randint(0, 1000, (sizes["batch"],))


def _text(sizes: Sizes) -> Tensor:
    return torch.randn(sizes["batch"], sizes["text"], TEXT_WIDTH)


def _video_inputs(sizes: Sizes) -> Inputs:
    return (), {
        "hidden_states": _latent(sizes),
        "timestep": _timestep(sizes),
        "encoder_hidden_states": _text(sizes),
        "return_dict": False,
    }


def _video(name: str, build: Callable[[], nn.Module], **changes: Any) -> None:
    settings: dict[str, Any] = {
        "make_inputs": _video_inputs,
        "sizes": _VIDEO_SIZES,
        "second": _VIDEO_SECOND,
        "dynamic_shapes": {
            "hidden_states": _LATENT,
            "timestep": _PER_ITEM,
            "encoder_hidden_states": _TEXT_TOKENS,
        },
    }
    _register(ZooEntry(name=name, build=build, **{**settings, **changes}))


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_WAN)


def _skyreels() -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**_WAN)


_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def _ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )


def _ltx_inputs(sizes: Sizes) -> Inputs:
    """LTX takes packed tokens, and the grid that they came from as plain integers."""
    frames, rows, columns = sizes["frames"], sizes["rows"], sizes["columns"]
    return (), {
        "hidden_states": torch.randn(sizes["batch"], frames * rows * columns, 8),
        "encoder_hidden_states": _text(sizes),
        "timestep": _timestep(sizes),
        "encoder_attention_mask": _right_padded(sizes["batch"], sizes["text"]),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "return_dict": False,
    }


def _latte() -> nn.Module:
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=12,
        num_attention_heads=2,
        caption_channels=TEXT_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        cross_attention_dim=24,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=1000,
        video_length=4,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )


def _hunyuanvideo() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )


def _hunyuanvideo_inputs(sizes: Sizes) -> Inputs:
    _, kwargs = _video_inputs(sizes)
    return (), {
        **kwargs,
        "encoder_attention_mask": _right_padded(sizes["batch"], sizes["text"]),
        "pooled_projections": torch.randn(sizes["batch"], 8),
        "guidance": torch.rand(sizes["batch"]) * 1000,
    }


def _mochi() -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=4,
        max_sequence_length=16,
        qk_norm="rms_norm",
        activation_fn="swiglu",
    )


def _mochi_inputs(sizes: Sizes) -> Inputs:
    return (), {
        "hidden_states": _latent(sizes, channels=12),
        "encoder_hidden_states": _text(sizes),
        "timestep": _timestep(sizes),
        "encoder_attention_mask": _right_padded(sizes["batch"], sizes["text"], torch.bool),
        "return_dict": False,
    }


def _allegro() -> nn.Module:
    from diffusers import AllegroTransformer3DModel

    return AllegroTransformer3DModel(
        patch_size=2,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=1,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=4,
        caption_channels=TEXT_WIDTH,
    )


def _allegro_inputs(sizes: Sizes) -> Inputs:
    _, kwargs = _video_inputs(sizes)
    return (), {
        **kwargs,
        "encoder_attention_mask": _right_padded(sizes["batch"], sizes["text"]),
        "image_rotary_emb": _allegro_rotary(sizes["frames"], sizes["rows"], sizes["columns"]),
    }


def _allegro_rotary(frames: int, rows: int, columns: int) -> tuple[Any, Any]:
    """The (frequency tables, token positions) that Allegro's pipeline passes, per axis."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=frames,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    tokens = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    return tuple(tables), tuple(positions[None].contiguous() for positions in tokens.unbind(1))


def _easyanimate() -> nn.Module:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        num_layers=1,
        mmdit_layers=1,
        sample_width=8,
        sample_height=8,
        patch_size=2,
        text_embed_dim_t5=None,
    )


def _cosmos() -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,
    )


def _cosmos_inputs(sizes: Sizes) -> Inputs:
    args, kwargs = _video_inputs(sizes)
    return args, {**kwargs, "timestep": torch.rand(sizes["batch"])}


def _cogvideox(rotary: bool) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=13,
        patch_size=2,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=rotary,
    )


def _cogvideox_inputs(sizes: Sizes) -> Inputs:
    """CogVideoX puts frames before channels."""
    _, kwargs = _video_inputs(sizes)
    return (), {**kwargs, "hidden_states": kwargs["hidden_states"].transpose(1, 2).contiguous()}


def _cogvideox_rotary_inputs(sizes: Sizes) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, rows, columns = sizes["frames"], sizes["rows"], sizes["columns"]
    rotary = get_3d_rotary_pos_embed(
        embed_dim=16,
        crops_coords=((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=frames,
    )
    args, kwargs = _cogvideox_inputs(sizes)
    return args, {**kwargs, "image_rotary_emb": rotary}


_LTX_SHAPES: DynamicShapes = {
    "hidden_states": {0: "batch"},
    "encoder_hidden_states": _TEXT_TOKENS,
    "timestep": _PER_ITEM,
    "encoder_attention_mask": _TEXT_TOKENS,
}
_MASKED_SHAPES: DynamicShapes = {
    "hidden_states": _LATENT,
    "timestep": _PER_ITEM,
    "encoder_hidden_states": _TEXT_TOKENS,
    "encoder_attention_mask": _TEXT_TOKENS,
}
_FIXED_GRID_SHAPES: DynamicShapes = {
    "hidden_states": {0: "batch"},
    "timestep": _PER_ITEM,
    "encoder_hidden_states": _TEXT_TOKENS,
}
_TOKENS = "frames*rows*columns"

_video("wan", _wan)
_video("skyreels", _skyreels)
_video(
    "easyanimate",
    _easyanimate,
    second={"batch": 3, "text": 9},
    dynamic_shapes=_FIXED_GRID_SHAPES,
    static_note="video size: the rotary table is computed from it in Python",
)
_video(
    "cosmos",
    _cosmos,
    make_inputs=_cosmos_inputs,
    second={"batch": 3, "text": 9},
    dynamic_shapes=_FIXED_GRID_SHAPES,
    static_note="video size: positions are computed from it with numpy",
)
_video(
    "ltx",
    _ltx,
    make_inputs=_ltx_inputs,
    second={"batch": 3, "text": 9},
    dynamic_shapes=_LTX_SHAPES,
    static_note="video size: the grid arrives as plain integers, which capture binds",
)
_video(
    "latte",
    _latte,
    second={"batch": 3, "text": 9},
    dynamic_shapes=_FIXED_GRID_SHAPES,
    static_note=(
        "frames: the temporal position table holds exactly video_length rows. Height and width "
        "are free only when captured at another size than the config's"
    ),
)
_video(
    "hunyuanvideo",
    _hunyuanvideo,
    make_inputs=_hunyuanvideo_inputs,
    dynamic_shapes={**_MASKED_SHAPES, "pooled_projections": _PER_ITEM, "guidance": _PER_ITEM},
)
_video("mochi", _mochi, make_inputs=_mochi_inputs, dynamic_shapes=_MASKED_SHAPES)
_video(
    "allegro",
    _allegro,
    make_inputs=_allegro_inputs,
    dynamic_shapes={
        **_MASKED_SHAPES,
        "image_rotary_emb": (
            tuple(({0: axis}, {0: axis}) for axis in ("frames", "rows", "columns")),
            tuple({1: _TOKENS} for _ in range(3)),
        ),
    },
)
_COGVIDEOX_LATENT = {0: "batch", 1: "frames", 3: "2*rows", 4: "2*columns"}
_video(
    "cogvideox",
    lambda: _cogvideox(rotary=False),
    make_inputs=_cogvideox_inputs,
    sizes={**_VIDEO_SIZES, "frames": 5, "rows": 3},
    second={"batch": 3, "frames": 7, "rows": 5, "columns": 2},
    dynamic_shapes={
        "hidden_states": _COGVIDEOX_LATENT,
        "timestep": _PER_ITEM,
        "encoder_hidden_states": _PER_ITEM,
    },
    static_note=(
        "text: the position table holds exactly max_text_seq_length text rows. The video size is "
        "free only when captured at another size than the config's, whose table is a buffer"
    ),
)
_video(
    "cogvideox_native",
    lambda: _cogvideox(rotary=False),
    make_inputs=_cogvideox_inputs,
    second={"batch": 3},
    dynamic_shapes={
        "hidden_states": _PER_ITEM,
        "timestep": _PER_ITEM,
        "encoder_hidden_states": _PER_ITEM,
    },
    static_note="video size: captured at the config's size, the position table is a constant",
)
_video(
    "cogvideox_rotary",
    lambda: _cogvideox(rotary=True),
    make_inputs=_cogvideox_rotary_inputs,
    dynamic_shapes={
        "hidden_states": _COGVIDEOX_LATENT,
        "timestep": _PER_ITEM,
        "encoder_hidden_states": _TEXT_TOKENS,
        "image_rotary_emb": ({0: _TOKENS}, {0: _TOKENS}),
    },
)
