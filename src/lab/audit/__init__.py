"""Surveys what audits find: model families of transformers, and public fixes."""
