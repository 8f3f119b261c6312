"""Judges: does a response comply with a harmful request, and does it refuse?"""
