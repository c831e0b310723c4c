"""Distillation: a student UNet learns from its teacher, of the same source.

Three things can be learnt: to do what the teacher does with less (`recover`), to do with one
evaluation what guidance took two for (`guidance`), and to do in a few steps what took many
(`steps`, `consistency`). Everything is torch, imported where it is used.
"""
