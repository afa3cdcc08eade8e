"""Train a transformer and its text encoders together, by flow matching on latents.

Beside it, T5 learns to tell the role of every color word (`color_roles.py` says why).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dirotq.assets.color_roles import ROLES, role_loss
from dirotq.assets.denoisers import Denoiser
from dirotq.assets.schedule import set_rate, timed_steps
from dirotq.assets.training_pool import Pool

_ROLE_WEIGHT = 0.1  # of the role loss, beside the flow loss


def train_diffusion(
    denoiser: Denoiser,
    pool: Pool,
    *,
    seconds: float,
    batch: int,
    peak_rate: float,
    warmup: int,
    emphasis: float,
    compiled: bool,
    checkpoint: Callable[[], None],
    checkpoint_every: float,
) -> dict[str, float | list[tuple[int, float, float]]]:
    """Train in place for `seconds`; at the end `denoiser` holds the averaged weights.

    emphasis    the probability with which a batch member is drawn from the pool's `ordered` rows
    checkpoint  called about every `checkpoint_every` seconds with the averaged weights in place
    returns     steps, the last running flow loss and role accuracy, and (step, loss, role accuracy)
                along the way
    """
    device = pool.latents.device
    # cuDNN's attention backward is known to crash at sequence lengths like ours.
    torch.backends.cuda.enable_cudnn_sdp(False)
    role_head = nn.Linear(denoiser.t5.config.d_model, ROLES, device=device)  # only for training

    def losses(
        clean: Tensor, noise: Tensor, time: Tensor, conditions: tuple[Tensor, ...], roles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What to minimize, and to watch: [flow loss, role accuracy]."""
        mixed = torch.lerp(clean, noise, time.view(-1, *[1] * (clean.ndim - 1)))
        velocity = denoiser.velocity(mixed, time, *conditions)
        flow = F.mse_loss(velocity.float(), noise - clean)
        role, accuracy = role_loss(role_head(conditions[0]), roles)
        return flow + _ROLE_WEIGHT * role, torch.stack([flow.detach(), accuracy])

    step_losses = torch.compile(losses, dynamic=False) if compiled else losses
    parameters = denoiser.parameters()
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        [*parameters, *role_head.parameters()],
        lr=peak_rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    for module in denoiser.modules():
        module.train()

    step, running = 0, torch.zeros(2, device=device)
    history: list[tuple[int, float, float]] = []
    next_checkpoint = checkpoint_every / seconds
    for step, fraction in timed_steps(seconds):
        set_rate(optimizer, peak_rate, step, fraction, warmup)
        chosen = torch.randint(len(pool.latents), (batch,), device=device)
        if emphasis:
            ordered = pool.ordered[torch.randint(len(pool.ordered), (batch,), device=device)]
            chosen = torch.where(torch.rand(batch, device=device) < emphasis, ordered, chosen)
        clean = denoiser.pack(pool.latents[chosen].float())
        noise = torch.randn_like(clean)
        time = torch.sigmoid(torch.randn(batch, device=device))
        with torch.autocast(device.type, torch.bfloat16):
            conditions, roles = denoiser.encode(pool, chosen)
            loss, watched = step_losses(clean, noise, time, conditions, roles)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            forget = 1e-3 if step > 2000 else 1e-2
            torch._foreach_lerp_(averaged, [p.detach() for p in parameters], forget)
            running = torch.lerp(running, watched, 0.02 if step > 50 else 1 / (step + 1))
        if step % 500 == 0 or step == 20:
            flow, role = running.tolist()
            history.append((step, flow, role))
            clock = f"{fraction * seconds:.0f} s"
            print(f"flow {step} {clock} loss {flow:.4f} roles right {role:.4f}", flush=True)
        if fraction > next_checkpoint:
            next_checkpoint = fraction + checkpoint_every / seconds
            with swapped(parameters, averaged):
                checkpoint()
    with torch.no_grad():
        torch._foreach_copy_(parameters, averaged)
    for module in denoiser.modules():
        module.eval()
    flow, role = running.tolist()
    return {"steps": step + 1, "loss": flow, "role_accuracy": role, "history": history}


@contextmanager
def swapped(parameters: list[Tensor], others: list[Tensor]) -> Iterator[None]:
    """Within the block, `parameters` hold the values of `others`."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, others)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
