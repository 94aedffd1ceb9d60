"""Evaluation of models beyond the likelihood of text: tasks, noise, characters, languages."""
