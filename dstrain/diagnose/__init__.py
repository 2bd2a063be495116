"""From what ranks left behind to the first failure and its verdict."""
