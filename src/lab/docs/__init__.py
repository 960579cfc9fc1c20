"""The page docs/configuration.md, generated from the dataclasses and the files in conf/."""
