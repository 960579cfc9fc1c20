"""Finds what could go non-finite in a model, before it does: `nonfinite.audit`."""

from nonfinite.auditing.audit_model import audit
from nonfinite.auditing.audit_report import Audit, Site, Witness

__all__ = ["Audit", "Site", "Witness", "audit"]
