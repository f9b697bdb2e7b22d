"""Hydra looks for plugins in modules named `hydra_plugins.*`: the installation puts this file there, as arriero.py."""

from hydra.core.config_store import ConfigStore

from orchestrator import hydra_launcher


class ArrieroLauncher(hydra_launcher.ArrieroLauncher):
    """`hydra/launcher=arriero`. Hydra takes no class of another module."""


ConfigStore.instance().store(group="hydra/launcher", name="arriero", node=hydra_launcher.LauncherConfig)
