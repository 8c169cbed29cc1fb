"""Tests for what users add to a training, as plain functions for any test framework."""

from .agreeing import assert_processes_agree as assert_processes_agree
from .resuming import assert_resumes_exactly as assert_resumes_exactly
