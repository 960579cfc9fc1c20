"""Stability options. A new one: its file here, its YAML in conf/stability, a line in REMEDIES.

They serve any LightningModule: src/nonfinite/README.md shows it.
"""

from src.stability.base import RemedyConfig, RunFacts
from src.stability.beta2 import Beta2Config
from src.stability.clip_norm import ClipNormConfig
from src.stability.clip_value import ClipValueConfig
from src.stability.early_stop import EarlyStopConfig
from src.stability.ema import EmaConfig
from src.stability.fp32 import Fp32Config
from src.stability.fp32_full import Fp32FullConfig
from src.stability.latent_norm import LatentNormConfig
from src.stability.lower_lr import LowerLRConfig
from src.stability.noise import NoiseConfig
from src.stability.qk_norm import QKNormConfig
from src.stability.router_eps import RouterEpsConfig
from src.stability.router_freeze import RouterFreezeConfig
from src.stability.router_z_loss import RouterZLossConfig
from src.stability.shaken import ShakenConfig, ShakenFullConfig
from src.stability.spike_skip import SpikeSkipConfig
from src.stability.warmdown import WarmdownConfig
from src.stability.z_loss import ZLossConfig
from src.stability.zclip import ZClipConfig

REMEDIES: dict[str, type[RemedyConfig]] = {
    # The write-up's.
    "clip03": ClipNormConfig,
    "clip05": ClipNormConfig,
    "early_stop": EarlyStopConfig,
    "ema": EmaConfig,
    "fp32": Fp32Config,
    "fp32_full": Fp32FullConfig,
    "lower_lr": LowerLRConfig,
    "noise": NoiseConfig,
    "warmdown": WarmdownConfig,
    # Controls: the null arm, and treatments known to work.
    "router_eps": RouterEpsConfig,
    "router_freeze": RouterFreezeConfig,
    "shaken": ShakenConfig,
    "shaken_full": ShakenFullConfig,
    # After the noise, because it acts on all that comes before clipping.
    "clip_value": ClipValueConfig,
    # The field's.
    "beta2": Beta2Config,
    "latent_norm": LatentNormConfig,
    "qk_norm": QKNormConfig,
    "router_z_loss": RouterZLossConfig,
    "spike_skip": SpikeSkipConfig,
    "z_loss": ZLossConfig,
    "zclip": ZClipConfig,
}

__all__ = [
    "REMEDIES",
    "Beta2Config",
    "ClipNormConfig",
    "ClipValueConfig",
    "EarlyStopConfig",
    "EmaConfig",
    "Fp32Config",
    "Fp32FullConfig",
    "LatentNormConfig",
    "LowerLRConfig",
    "NoiseConfig",
    "QKNormConfig",
    "RemedyConfig",
    "RouterEpsConfig",
    "RouterFreezeConfig",
    "RouterZLossConfig",
    "RunFacts",
    "ShakenConfig",
    "ShakenFullConfig",
    "SpikeSkipConfig",
    "WarmdownConfig",
    "ZClipConfig",
    "ZLossConfig",
]
