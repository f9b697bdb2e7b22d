"""What you choose: Hydra config groups. A new size, source, cluster or zone is one YAML file here."""
