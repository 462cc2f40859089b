"""KV pages: who holds which, and what they hold. Plain Python and numpy; a page is an integer here."""
