"""A run's weights as a folder for diffusers or ComfyUI."""

from tempflow.export.write import Form, Which, check_hub_name, export_run, merge, push, run_config

__all__ = ["Form", "Which", "check_hub_name", "export_run", "merge", "push", "run_config"]
