"""Answers names of other libraries and of earlier versions with a sentence on what to use here.

Without it a class that was written for another library would be ignored silently, and a wrong name would get
a bare error of Python.
"""
