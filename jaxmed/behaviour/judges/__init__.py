"""Judges: does a response comply with a harmful request, and does it refuse?

`protocol` says what every judge reads and says; a judge of your own is any object with that
protocol. Those here: `rules.RefusalPhrases`, a smoke test; `rules.FirstTokens`, exact for languages
of abstract tokens; `model.JudgeModel`, a classifier that is itself a language model, described by a
`templates.Template`. `named` finds them by name; `agreement` compares a judge with people's labels.
"""
