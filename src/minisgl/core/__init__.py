"""One request from token ids to token ids, on any device."""
