"""Runs with several processes: how they are started, how networks are distributed over them, how they communicate."""
