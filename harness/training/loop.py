"""The distillation loop: the original model teaches a copy whose activation has changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import ConfigError
from harness.training.adapter import Adapter
from harness.training.data import Batches
from harness.training.experts import efficiency_weight, first_router
from harness.training.llama import Model, make_block, norm, rotary
from harness.training.losses import divergence, head_divergence
from harness.training.sparsity import progressive_weight, square_gains, steer_threshold, threshold_target

STATE, CARRIED = "state.safetensors", "carried.safetensors"
AGAIN = 20  # steps over which the rate rises where the optimiser starts anew: its second moments reach back as far

# Dense bf16 peak of the cards seen, FLOP/s, for the model FLOPs utilisation.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass  # not frozen: OmegaConf would make it read-only before the YAML is read
class Recipe:
    """The hyper-parameters of one variant: the fields of conf/train/*.yaml."""

    name: str = MISSING
    activation: str = MISSING  # a key of harness.model.activations.ACTIVATIONS
    start: str = "silu"  # the activation that the run starts from
    init_from: str | None = None  # variant (its run of the same model and seed), folder or checkpoint to go on from
    steps: int = 2900
    batch: int = 24
    length: int = 1024
    rank: int = 64
    factor: float = 2.0
    learning_rate: float = 3e-3
    final_rate: float = 0.01  # share of the learning rate that is left at the last step
    warmup: int = 50
    clip: float = 1.0
    real_share: float = 0.1  # share of the windows that are real text
    seed: int = 0
    blend: float = 0.0  # share of the run over which `start` fades into `activation`
    fit_gains: bool = False  # least-squares gain per neuron, new activation onto the old one, before step 0
    l1_ends: list[float] = field(default_factory=list)
    l1_peaks: list[float] = field(default_factory=list)
    zeros: float = 0.0  # share of zeros that the threshold is steered to; 0 leaves the threshold alone
    zeros_ramp: float = 0.5
    zeros_freeze: float = 0.8
    zeros_rate: float = 0.02
    expert_size: int = 0  # neurons per expert (LTE); 0: no experts
    efficiency: float = 0.0  # weight of the mean squared router score, while more experts are chosen than `budget`
    budget: float = 0.0  # share of experts that the efficiency loss leaves alone; 0: it never rests
    separability: float = 0.0  # weight of the inverse squared distance of scores from one half, when the soft part ends
    hard_from: float = 0.5  # share of the run after which routers are frozen and the selection is hard
    router_rate: float = 1.0  # learning rate of the routers, as a share of the factors'
    ship_rank: int = 0  # rank that the trained factors are cut to before they ship; 0: all of it


ConfigStore.instance().store(group="train", name="recipe", node=Recipe)  # the defaults of conf/train


class Trainer:
    """One run: weights, optimiser, step counter and the curve so far. `save` and `load` are exact on one device."""

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        batches: Batches,
        device: torch.device,
        init: Mapping[str, Tensor] | None = None,
        experts: Tensor | None = None,
    ) -> None:
        """init: the tensors of an adapter to go on from (`harness.training.checkpoints.read_adapter`); experts:
        expert of each neuron [layers, neurons].
        """
        self.recipe, self.batches, self.device = recipe, batches, device
        fast = device.type == "cuda"
        self.dtype = torch.bfloat16 if fast else torch.float32
        self.base = {name: w.to(device) for name, w in model.linears.items()}
        self.teacher = model.to(device, self.dtype)
        self.shape = model.shape
        self.adapter = Adapter(model, recipe.rank, recipe.factor, recipe.seed).to(device)
        self.router: torch.nn.Parameter | None = None
        self.experts = experts.to(device) if experts is not None else None
        if experts is not None:
            size = (self.shape.layers, int(experts.max()) + 1, self.shape.width)
            self.router = torch.nn.Parameter(torch.zeros(size, device=device))
        self.threshold = torch.zeros((), device=device)
        if init is not None:
            self._start_from(init)
        self.blend = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), weight_decay=0.0, fused=fast)
        self.step = 0
        self.begun = 0  # the step at which the optimiser started without moments
        self.history: list[dict[str, float]] = []
        self.first_magnitude = torch.zeros(self.shape.layers, device=device)  # set by the first step

        def compiled(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False) if fast else function

        self._merge = compiled(self.adapter)
        self._divergence = compiled(divergence)
        self._teacher_block = compiled(make_block(self.shape, "silu", statistics=False))
        self._block = compiled(make_block(self.shape, recipe.activation, recipe.start, experts=experts is not None))
        self.cos, self.sin = rotary(self.shape, torch.arange(recipe.length, device=device))
        if recipe.fit_gains:
            self._fit_gains()
        if self.router is not None and (init is None or "router" not in init):
            self._fit_routers()

    def _groups(self) -> list[dict[str, Any]]:
        groups = [{"params": list(self.adapter.parameters()), "lr": self.recipe.learning_rate, "kind": "adapter"}]
        if self.router is not None:
            rate = self.recipe.learning_rate * self.recipe.router_rate
            groups.append({"params": [self.router], "lr": rate, "kind": "router"})
        return groups

    def _start_from(self, init: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.adapter.named_parameters():
                if parameter.shape != init[name].shape:
                    raise ConfigError(
                        f"{name} is {[*init[name].shape]} in what this run goes on from, and {[*parameter.shape]} at "
                        f"train.rank={self.recipe.rank}: give the rank that it has"
                    )
                parameter.copy_(init[name])
            if "threshold" in init:
                self.threshold.copy_(init["threshold"].mean())
            if self.router is not None and "router" in init:
                self.router.copy_(init["router"])

    # ------------------------------------------------------------------------------------------ forward

    def layers(self, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """The student's weights per layer, merged, differentiable."""
        stacks = dict(self._merge(self.base, dtype)) | self.teacher.fixed
        if self.router is not None:
            stacks |= {"router": self.router.to(dtype), "expert_of": self.experts}
        columns = {name: stack.unbind(0) for name, stack in stacks.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(self.shape.layers)]

    @torch.no_grad()
    def _teach(self, tokens: Tensor) -> Tensor:
        x = self.teacher.embedding[tokens]
        for i in range(self.shape.layers):
            (x,) = self._teacher_block(x, self.teacher.layer(i), self.cos, self.sin, self.threshold, self.blend)
        return norm(x, self.teacher.final_norm, self.shape.epsilon)

    @torch.no_grad()
    def _fit_gains(self) -> None:
        """Give each neuron of the new activation the gain that best reproduces the old one (into `up`)."""
        from harness.model.activations import ACTIVATIONS

        new, old = ACTIVATIONS[self.recipe.activation], ACTIVATIONS[self.recipe.start]
        x = self.teacher.embedding[self.batches.at(-1)]
        block = make_block(self.shape, self.recipe.start, self.recipe.start)
        for i, w in enumerate(self.layers(self.dtype)):
            seen: dict[str, Tensor] = {}
            x = block(x, w, self.cos, self.sin, self.threshold, self.blend, observe=seen)[0]
            target = old.hidden(seen["gate"].float(), seen["up"].float()).flatten(0, -2)
            given = new.hidden(seen["gate"].float(), seen["up"].float()).flatten(0, -2)
            gains = square_gains(given.square().sum(0), (given * target).sum(0))
            # W' = W (1 + s) + f B A: scaling the whole row scales 1 + s and the row of B
            self.adapter.scale["up"][i].copy_((1 + self.adapter.scale["up"][i]) * gains - 1)
            self.adapter.b["up"][i].mul_(gains[:, None])

    @torch.no_grad()
    def _fit_routers(self) -> None:
        """Start the routers from what the dense model's experts put out on one batch."""
        from harness.model.activations import ACTIVATIONS

        assert self.router is not None and self.experts is not None
        x = self.teacher.embedding[self.batches.at(-1)]
        block = make_block(self.shape, self.recipe.start, self.recipe.start)
        for i, w in enumerate(self.layers(self.dtype)):
            seen: dict[str, Tensor] = {}
            x = block(x, w, self.cos, self.sin, self.threshold, self.blend, observe=seen)[0]
            hidden = ACTIVATIONS[self.recipe.start].hidden(seen["gate"], seen["up"])
            router = first_router(seen["input"].flatten(0, 1), hidden.flatten(0, 1), w["down"], self.experts[i])
            self.router[i].copy_(router)

    # --------------------------------------------------------------------------------------------- step

    def _rate(self, step: int) -> float:
        """Share of the learning rate: up over `warmup` steps, then down; up again where the optimiser starts anew."""
        if step < self.recipe.warmup:
            return (step + 1) / self.recipe.warmup
        left = 1 - (step - self.recipe.warmup) / max(1, self.recipe.steps - self.recipe.warmup)
        rate = self.recipe.final_rate + (1 - self.recipe.final_rate) * left
        return rate * min(1.0, (step + 1 - self.begun) / AGAIN) if self.begun else rate

    def advance(self) -> dict[str, Tensor]:
        """One optimiser step. Returns 0-d tensors still on the device: kl, loss, zeros, threshold, magnitude; with
        experts also the share chosen and the separability term.
        """
        recipe, progress = self.recipe, self.step / self.recipe.steps
        tokens = self.batches.at(self.step)
        hard = self.router is not None and progress >= recipe.hard_from
        fade = min(1.0, progress / recipe.blend) if recipe.blend > 0 else 1.0
        self.blend.fill_(float(hard) if self.router is not None else fade)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * self._rate(self.step)
            if group["kind"] == "router":
                group["lr"] *= 0.0 if hard else recipe.router_rate
        target = self._teach(tokens)
        # the first layer's input asks for a gradient too, so that one compiled block serves every layer
        x = self.teacher.embedding[tokens].requires_grad_()
        magnitudes, zeros, routers = [], [], []
        for w in self.layers(self.dtype):
            x, magnitude, zero, router = self._block(x, w, self.cos, self.sin, self.threshold, self.blend)
            magnitudes.append(magnitude)
            zeros.append(zero)
            routers.append(router)
        x = norm(x, self.teacher.final_norm, self.shape.epsilon)
        kl = head_divergence(x.flatten(0, 1), target.flatten(0, 1), self.teacher.head, kernel=self._divergence)
        magnitude = torch.stack(magnitudes)
        if self.step == 0:
            self.first_magnitude.copy_(magnitude.detach())
        relative = (magnitude / self.first_magnitude).mean()
        loss = kl + progressive_weight(progress, recipe.l1_ends, recipe.l1_peaks) * relative
        efficient, separate, chosen = torch.stack(routers).mean(0)
        chosen = chosen.detach()
        if self.router is not None and not hard:
            loss = loss + efficiency_weight(recipe.efficiency, chosen, recipe.budget) * efficient
            # the closer to the hard part, the more it matters that rounding a score changes little
            loss = loss + recipe.separability * progress / recipe.hard_from * separate
        loss.backward()
        for group in self.optimizer.param_groups:  # apart, or the routers' terms would slow the weights' steps
            torch.nn.utils.clip_grad_norm_(group["params"], recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        share = torch.stack(zeros).mean().detach()
        wanted = threshold_target(progress, recipe.zeros, recipe.zeros_ramp, recipe.zeros_freeze)
        if wanted is not None:
            self.threshold.copy_(steer_threshold(self.threshold, share, wanted, recipe.zeros_rate))
        self.step += 1
        return {
            "kl": kl.detach(),
            "loss": loss.detach(),
            "zeros": share,
            "threshold": self.threshold.clone(),
            "magnitude": relative.detach(),
            **({"chosen": chosen, "separability": separate.detach()} if self.router is not None else {}),
        }

    def run(
        self,
        folder: Path,
        log_every: int,
        save_every_s: float,
        report: Callable[[dict[str, float]], None],
        stop_at: int | None = None,
        deadline: float | None = None,
    ) -> None:
        """Train until the recipe's last step, `stop_at` or the `deadline` (of `time.monotonic`), whichever is first.

        The state is written to `folder` at the end and every `save_every_s` seconds. Both are looked at every
        `log_every` steps, where the device has caught up; a run whose next stretch would end too late stops before it.
        The small state is written where it ends, early or not.
        """
        end = min(self.recipe.steps, stop_at or self.recipe.steps)
        seen: list[dict[str, Tensor]] = []
        since = saved = time.monotonic()
        while self.step < end:
            seen.append(self.advance())
            if self.step % log_every and self.step != end:
                continue
            entry = {key: torch.stack([s[key] for s in seen]).mean().item() for key in seen[0]}
            now = time.monotonic()
            seconds, since = now - since, now
            tokens = self.recipe.batch * self.recipe.length
            entry |= {"step": self.step, "tokens": self.step * tokens, "rate": self._rate(self.step - 1)}
            self.history.append(dict(entry))
            report(entry | {"tokens_per_second": len(seen) * tokens / seconds, **self._utilisation(len(seen), seconds)})
            seen = []
            late = deadline is not None and now + seconds > deadline
            if late or self.step == end or now - saved >= save_every_s:
                self.save(folder)
                since = saved = time.monotonic()
            if late:
                break
        self.save(folder, small=True)

    def flops_per_token(self) -> float:
        """Executed model FLOPs a token: student 6N, frozen head 4N, teacher 2N, causal attention in both."""
        s = self.shape
        head = s.width * s.vocabulary
        attention = 2 * s.layers * s.width * self.recipe.length  # forward: 4 * width * length / 2 a layer
        return 6 * s.linear_weights + 4 * head + 2 * (s.linear_weights + head) + (3 + 1) * attention

    def _utilisation(self, steps: int, seconds: float) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        name = torch.cuda.get_device_name(self.device)
        peak = next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)
        tokens = steps * self.recipe.batch * self.recipe.length
        return {"mfu": tokens * self.flops_per_token() / seconds / peak} if peak else {}

    # --------------------------------------------------------------------------------- state of the run

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What the run has learnt, fp32 on the CPU: a.*, b.*, scale.*, threshold [layers], router, expert_of."""
        tensors = {name: p.detach().cpu().clone() for name, p in self.adapter.named_parameters()}
        tensors["threshold"] = self.threshold.cpu().expand(self.shape.layers).clone()
        if self.router is not None and self.experts is not None:
            tensors |= {"router": self.router.detach().cpu().clone(), "expert_of": self.experts.cpu()}
        return tensors

    def save(self, folder: Path, small: bool = False) -> None:
        """Write the state of the run to `folder`, whole or not at all.

        `STATE` goes on exactly as if nothing had happened: fp32, 12 bytes a trained value. The small one, `CARRIED`,
        has 2: rounded to bf16, without the moments, which at these betas a run makes again in `AGAIN` steps.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.adapter_tensors()
        if small:
            rounded = ("a.", "b.", "scale.", "router")
            tensors = {k: v.bfloat16() if k.startswith(rounded) else v for k, v in tensors.items()}
        else:
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": value.cpu() for key, value in state.items()}
        tensors["first_magnitude"] = self.first_magnitude.cpu()
        meta = {"step": str(self.step), "begun": str(self.begun), "history": json.dumps(self.history)}
        path = folder / (CARRIED if small else STATE)
        scratch = path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in tensors.items()}, scratch, metadata=meta)
        os.replace(scratch, path)

    def load(self, folder: Path) -> bool:
        """Go on from the state in `folder`, the small one if it is further; False where there is none."""
        if (found := read_state(folder)) is None:
            return False
        tensors, meta = found
        self._start_from(tensors)
        self.first_magnitude = tensors["first_magnitude"].to(self.device)
        self.step, self.history = int(meta["step"]), json.loads(meta["history"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        self.begun = int(meta["begun"]) if state else self.step
        if state:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return True


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors of a run's state, fp32, and its step, `begun` and history as text; None where there is none."""
    there = [folder / name for name in (STATE, CARRIED) if (folder / name).exists()]
    if not there:
        return None
    opened = [safe_open(path, "pt") for path in there]
    file = max(opened, key=lambda file: int(file.metadata()["step"]))  # the first of equal ones, which is exact
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}, file.metadata()
