"""Stability remedies. To add one: a file here, a YAML in conf/stability and a line in REMEDIES.

Remedies work with any LightningModule; src/nonfinite/README.md shows how.
"""

from src.stability.adagc import AdaGCConfig
from src.stability.adam_eps import AdamEpsConfig
from src.stability.base import RemedyConfig, RunFacts
from src.stability.beta2 import Beta2Config
from src.stability.clip_norm import ClipNormConfig
from src.stability.clip_value import ClipValueConfig
from src.stability.early_stop import EarlyStopConfig
from src.stability.ema import EmaConfig
from src.stability.fp32 import Fp32Config
from src.stability.fp32_full import Fp32FullConfig
from src.stability.gated_attention import GatedAttentionConfig
from src.stability.latent_norm import LatentNormConfig
from src.stability.lower_lr import LowerLRConfig
from src.stability.muon import MuonConfig
from src.stability.noise import NoiseConfig
from src.stability.qk_clip import QKClipConfig
from src.stability.qk_norm import QKNormConfig
from src.stability.rewind import RewindConfig
from src.stability.router_center import RouterCenterConfig
from src.stability.router_eps import RouterEpsConfig
from src.stability.router_freeze import RouterFreezeConfig
from src.stability.router_smebu import RouterSmebuConfig
from src.stability.router_z_loss import RouterZLossConfig
from src.stability.shaken import ShakenConfig, ShakenFullConfig
from src.stability.softcap_attention import SoftCapAttentionConfig
from src.stability.softcap_head import SoftCapHeadConfig
from src.stability.softcap_router import SoftCapRouterConfig
from src.stability.spam import SpamConfig
from src.stability.spike_skip import SpikeSkipConfig
from src.stability.stable_adamw import StableAdamWConfig
from src.stability.swiglu_clamp import SwiGLUClampConfig
from src.stability.warmdown import WarmdownConfig
from src.stability.z_loss import ZLossConfig
from src.stability.zclip import ZClipConfig

REMEDIES: dict[str, type[RemedyConfig]] = {
    # Changes weights after the step, so it comes before ema, which averages them.
    "qk_clip": QKClipConfig,
    # Proposed in the write-up.
    "clip03": ClipNormConfig,
    "clip05": ClipNormConfig,
    "early_stop": EarlyStopConfig,
    "ema": EmaConfig,
    "fp32": Fp32Config,
    "fp32_full": Fp32FullConfig,
    "lower_lr": LowerLRConfig,
    "noise": NoiseConfig,
    "warmdown": WarmdownConfig,
    # Controls: positive controls (known to work) and A/A controls (known to do nothing).
    "router_eps": RouterEpsConfig,
    "router_eps20": RouterEpsConfig,
    "router_freeze": RouterFreezeConfig,
    "shaken": ShakenConfig,
    "shaken_full": ShakenFullConfig,
    # Callbacks run in this order: clip_value must also bound the entries that the noise changed.
    "clip_value": ClipValueConfig,
    # Common in the literature.
    "adagc": AdaGCConfig,
    "adam_eps": AdamEpsConfig,
    "beta2": Beta2Config,
    "gated_attention": GatedAttentionConfig,
    "latent_norm": LatentNormConfig,
    "muon": MuonConfig,
    "qk_norm": QKNormConfig,
    "rewind": RewindConfig,
    "router_center": RouterCenterConfig,
    "router_smebu": RouterSmebuConfig,
    "router_z_loss": RouterZLossConfig,
    "softcap_attention": SoftCapAttentionConfig,
    "softcap_head": SoftCapHeadConfig,
    "softcap_router": SoftCapRouterConfig,
    "spam": SpamConfig,
    "spike_skip": SpikeSkipConfig,
    "stable_adamw": StableAdamWConfig,
    "swiglu_clamp": SwiGLUClampConfig,
    "z_loss": ZLossConfig,
    "zclip": ZClipConfig,
}

__all__ = [
    "REMEDIES",
    "AdaGCConfig",
    "AdamEpsConfig",
    "Beta2Config",
    "ClipNormConfig",
    "ClipValueConfig",
    "EarlyStopConfig",
    "EmaConfig",
    "Fp32Config",
    "Fp32FullConfig",
    "GatedAttentionConfig",
    "LatentNormConfig",
    "LowerLRConfig",
    "MuonConfig",
    "NoiseConfig",
    "QKClipConfig",
    "QKNormConfig",
    "RemedyConfig",
    "RewindConfig",
    "RouterCenterConfig",
    "RouterEpsConfig",
    "RouterFreezeConfig",
    "RouterSmebuConfig",
    "RouterZLossConfig",
    "RunFacts",
    "ShakenConfig",
    "ShakenFullConfig",
    "SoftCapAttentionConfig",
    "SoftCapHeadConfig",
    "SoftCapRouterConfig",
    "SpamConfig",
    "SpikeSkipConfig",
    "StableAdamWConfig",
    "SwiGLUClampConfig",
    "WarmdownConfig",
    "ZClipConfig",
    "ZLossConfig",
]
