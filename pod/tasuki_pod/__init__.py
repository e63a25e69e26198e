"""What prefill and decode pods share: an HTTP process without torch, and an engine process behind it."""
