"""The online benchmark: requests over HTTP at given times, against any server that speaks OpenAI's protocol."""
