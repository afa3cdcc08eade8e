import torch
from tiny_line import POOLED, TEXT, build_transformer

from dirotq.models.flux import FLUX

from .contract import FamilyContract


class TestFlux(FamilyContract):
    family = FLUX

    def transformer(self):
        return build_transformer(num_layers=2, num_single_layers=2, guidance_embeds=True)

    def inputs(self):
        torch.manual_seed(0)
        return {
            "hidden_states": torch.randn(2, 9, 16),
            "encoder_hidden_states": torch.randn(2, 5, TEXT),
            "pooled_projections": torch.randn(2, POOLED),
            "timestep": torch.tensor([0.3, 0.8]),
            "guidance": torch.tensor([3.5, 1.0]),
            "img_ids": torch.randint(0, 3, (9, 3)),
            "txt_ids": torch.zeros(5, 3),
        }


def test_sites_of_a_block_in_order():
    sites = FLUX.sites(build_transformer())
    assert [(site.name, site.kind, site.in_features, site.out_features) for site in sites] == [
        ("transformer_blocks.0.norm1.linear", "modulator", 64, (384,)),
        ("transformer_blocks.0.norm1_context.linear", "modulator", 64, (384,)),
        ("transformer_blocks.0.attn.qkv", "block", 64, (64, 64, 64)),
        ("transformer_blocks.0.attn.add_qkv", "block", 64, (64, 64, 64)),
        ("transformer_blocks.0.attn.to_out.0", "block", 64, (64,)),
        ("transformer_blocks.0.attn.to_add_out", "block", 64, (64,)),
        ("transformer_blocks.0.ff.net.0.proj", "block", 64, (256,)),
        ("transformer_blocks.0.ff.net.2", "block", 256, (64,)),
        ("transformer_blocks.0.ff_context.net.0.proj", "block", 64, (256,)),
        ("transformer_blocks.0.ff_context.net.2", "block", 256, (64,)),
        ("single_transformer_blocks.0.norm.linear", "modulator", 64, (192,)),
        ("single_transformer_blocks.0.qkv_mlp", "block", 64, (64, 64, 64, 256)),
        ("single_transformer_blocks.0.proj_out", "block", 320, (64,)),
    ]
