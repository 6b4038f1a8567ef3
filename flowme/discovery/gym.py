"""The environment for agents written against gymnasium. Needs `pip install flowme[gym]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

try:
    import gymnasium
except ImportError as error:
    raise ImportError(
        "this adapter needs gymnasium, which is not installed: pip install 'flowme[gym]'"
    ) from error

from .environment import Environment, State, mask_add, mask_drop, reset, step


class NetworkEnv(gymnasium.Env):
    """One episode builds one network; its reward comes at the end.

    Actions are the pairs (drop, add) of `environment`. An observation has the reactions chosen,
    the hidden species opened, the steps left, and what is legal: `drop` [L + 1], and `add` [L + 2]
    without a drop. With a drop, `add_after(drop)` is what is legal.

    Args:
        env: what may be built.
        reward: `reward(structures) -> [B]` of structures bool [B, L].
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        env: Environment,
        reward: Callable[[np.ndarray], Any],
        render_mode: str | None = None,
    ):
        size = len(env.library)
        self.env, self.reward, self.render_mode = env, reward, render_mode
        self.action_space = gymnasium.spaces.MultiDiscrete([size + 1, size + 2])
        self.observation_space = gymnasium.spaces.Dict(
            {
                "chosen": gymnasium.spaces.MultiBinary(size),
                "hidden": gymnasium.spaces.Discrete(len(env.hidden) + 1),
                "steps": gymnasium.spaces.Discrete(env.max_steps + 1),
                "drop": gymnasium.spaces.MultiBinary(size + 1),
                "add": gymnasium.spaces.MultiBinary(size + 2),
            }
        )
        self._step = jax.jit(step)
        self._masks = jax.jit(lambda env, s: (mask_drop(env, s), mask_add(env, s)))
        self._state: State = reset(env)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        del options
        self._state = reset(self.env)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        left = int(self._state.steps)
        self._state = self._step(self.env, self._state, np.asarray(action))
        done = bool(self._state.done)
        stopped = tuple(int(a) for a in action) == 2 * (len(self.env.library),)
        reward = float(np.asarray(self.reward(self.structure[None]))[0]) if done else 0.0
        ended = done and stopped and (left > 1 or bool(self.structure.any()))
        return self._observation(), reward, ended, done and not ended, {}

    def add_after(self, drop: int) -> np.ndarray:
        """Which `add` are legal with this `drop`, bool [L + 2]."""
        return np.asarray(mask_add(self.env, self._state, drop))

    @property
    def structure(self) -> np.ndarray:
        """The reactions chosen so far, bool [L]."""
        return np.asarray(self._state.chosen)

    def render(self) -> str | None:
        if self.render_mode is None:
            return None
        reactions = self.env.library.reactions
        return (
            "; ".join(str(reactions[r]) for r in np.flatnonzero(self.structure)) or "no reactions"
        )

    def _observation(self) -> dict[str, Any]:
        drop, add = self._masks(self.env, self._state)
        return {
            "chosen": self.structure.astype(np.int8),
            "hidden": np.int64(self._state.hidden),
            "steps": np.int64(self._state.steps),
            "drop": np.asarray(drop, np.int8),
            "add": np.asarray(add, np.int8),
        }
