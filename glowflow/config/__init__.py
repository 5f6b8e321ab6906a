"""The typed experiment file: schema, YAML and overrides, registry of names, errors. Needs pydantic and PyYAML only."""
