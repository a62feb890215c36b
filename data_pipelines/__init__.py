"""Offline jobs that make datasets: they import the package and are never imported by it."""
