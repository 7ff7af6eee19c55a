"""Hearing: sound files and samples to log-mel frames to soft tokens; knows no text, decoder or protocol."""
