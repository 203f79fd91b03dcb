"""Audit: the same quantity computed by several packages, and why they differ."""

from noisekit.auditing.auditing import Comparison, audit
from noisekit.auditing.report import AuditReport, AuditRow, AuditVerdict

__all__ = ["AuditReport", "AuditRow", "AuditVerdict", "Comparison", "audit"]
