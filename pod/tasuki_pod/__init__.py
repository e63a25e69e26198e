"""What prefill and decode pods share: a light HTTP process, an engine process behind it."""
