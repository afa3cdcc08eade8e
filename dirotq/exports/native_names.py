"""What a family's modules are called in the files of its authors, which ComfyUI reads.

Tables, as in models/: a family that is not here has no published naming beside that of diffusers,
or ComfyUI has no such model.
"""

from dataclasses import dataclass

from dirotq.errors import UnsupportedError
from dirotq.models.families import FAMILIES


@dataclass(frozen=True, slots=True)
class Rename:
    """One native module, and the diffusers modules whose rows it holds one below the other.

    Paths have ``*`` for one component, the same on both sides. ``scale``: its ``weight`` is called
    ``scale``. ``swapped``: the two halves of its rows change places.
    """

    native: str
    modules: tuple[str, ...]
    scale: bool = False
    swapped: bool = False


def _norms(native: str, attention: str, query: str, key: str) -> tuple[Rename, ...]:
    return (
        Rename(f"{native}.query_norm", (f"{attention}.{query}",), scale=True),
        Rename(f"{native}.key_norm", (f"{attention}.{key}",), scale=True),
    )


def _joined(path: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"

FLUX_ENDS = (
    Rename("img_in", ("x_embedder",)),
    Rename("txt_in", ("context_embedder",)),
    Rename("final_layer.linear", ("proj_out",)),
    # Shift and scale there, scale and shift in diffusers.
    Rename("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
)
FLUX_ATTENTION = (
    Rename("double_blocks.*.img_attn.qkv", _joined(f"{DOUBLE}.attn", *QKV)),
    Rename("double_blocks.*.txt_attn.qkv", _joined(f"{DOUBLE}.attn", *ADDED_QKV)),
    Rename("double_blocks.*.img_attn.proj", (f"{DOUBLE}.attn.to_out.0",)),
    Rename("double_blocks.*.txt_attn.proj", (f"{DOUBLE}.attn.to_add_out",)),
    *_norms("double_blocks.*.img_attn.norm", f"{DOUBLE}.attn", "norm_q", "norm_k"),
    *_norms("double_blocks.*.txt_attn.norm", f"{DOUBLE}.attn", "norm_added_q", "norm_added_k"),
    *_norms("single_blocks.*.norm", f"{SINGLE}.attn", "norm_q", "norm_k"),
)
FLUX = (
    *FLUX_ENDS,
    *FLUX_ATTENTION,
    Rename("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    Rename("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    Rename("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Rename("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Rename("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    Rename("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    Rename("double_blocks.*.img_mod.lin", (f"{DOUBLE}.norm1.linear",)),
    Rename("double_blocks.*.txt_mod.lin", (f"{DOUBLE}.norm1_context.linear",)),
    Rename("double_blocks.*.img_mlp.0", (f"{DOUBLE}.ff.net.0.proj",)),
    Rename("double_blocks.*.img_mlp.2", (f"{DOUBLE}.ff.net.2",)),
    Rename("double_blocks.*.txt_mlp.0", (f"{DOUBLE}.ff_context.net.0.proj",)),
    Rename("double_blocks.*.txt_mlp.2", (f"{DOUBLE}.ff_context.net.2",)),
    Rename("single_blocks.*.modulation.lin", (f"{SINGLE}.norm.linear",)),
    Rename("single_blocks.*.linear1", (*_joined(f"{SINGLE}.attn", *QKV), f"{SINGLE}.proj_mlp")),
    Rename("single_blocks.*.linear2", (f"{SINGLE}.proj_out",)),
)
FLUX2 = (
    *FLUX_ENDS,
    *FLUX_ATTENTION,
    Rename("time_in.in_layer", ("time_guidance_embed.timestep_embedder.linear_1",)),
    Rename("time_in.out_layer", ("time_guidance_embed.timestep_embedder.linear_2",)),
    Rename("guidance_in.in_layer", ("time_guidance_embed.guidance_embedder.linear_1",)),
    Rename("guidance_in.out_layer", ("time_guidance_embed.guidance_embedder.linear_2",)),
    Rename("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
    Rename("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
    Rename("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
    Rename("double_blocks.*.img_mlp.0", (f"{DOUBLE}.ff.linear_in",)),
    Rename("double_blocks.*.img_mlp.2", (f"{DOUBLE}.ff.linear_out",)),
    Rename("double_blocks.*.txt_mlp.0", (f"{DOUBLE}.ff_context.linear_in",)),
    Rename("double_blocks.*.txt_mlp.2", (f"{DOUBLE}.ff_context.linear_out",)),
    Rename("single_blocks.*.linear1", (f"{SINGLE}.attn.to_qkv_mlp_proj",)),
    Rename("single_blocks.*.linear2", (f"{SINGLE}.attn.to_out",)),
)


def _refined(path: str) -> tuple[Rename, ...]:
    """Return the rules of a block of Z-Image; what is not named keeps its name."""
    attention = f"{path}.attention"
    return (
        Rename(f"{attention}.qkv", _joined(attention, *QKV)),
        Rename(f"{attention}.out", (f"{attention}.to_out.0",)),
        Rename(f"{attention}.q_norm", (f"{attention}.norm_q",)),
        Rename(f"{attention}.k_norm", (f"{attention}.norm_k",)),
    )


Z_IMAGE = (
    *(rule for path in ("layers.*", "noise_refiner.*", "context_refiner.*")
      for rule in _refined(path)),
    Rename("x_embedder", ("all_x_embedder.2-1",)),
    Rename("final_layer.linear", ("all_final_layer.2-1.linear",)),
    Rename("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
)  # fmt: skip

NAMES: dict[str, tuple[Rename, ...]] = {
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "ZImageTransformer2DModel": Z_IMAGE,
    "QwenImageTransformer2DModel": (),
}
WHOLE = frozenset({"FluxTransformer2DModel", "Flux2Transformer2DModel"})
"""Classes whose every module has another name; elsewhere one without a rule keeps its own."""


def native_names(transformer_class: str) -> tuple[Rename, ...]:
    """Return the table of a diffusers class. Raises UnsupportedError, naming those there are."""
    if transformer_class in NAMES:
        return NAMES[transformer_class]
    known = ", ".join(f"{f.name} ({f.transformer})" for f in FAMILIES if f.transformer in NAMES)
    raise UnsupportedError(
        f"a {transformer_class} has no native key names that DiRotQ can convert to, and an "
        f"exported file needs them; it knows those of {known}. The packed folder itself runs in "
        "diffusers"
    )
