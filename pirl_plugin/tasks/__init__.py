"""Training tasks."""

from pirl_plugin.tasks.ssl_pretraining import SSLPretrainingTask

__all__ = ["SSLPretrainingTask"]
