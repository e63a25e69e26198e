//go:build tools

// Package tools names the command that plays nodes by the hundred.
package tools

import _ "sigs.k8s.io/kwok/cmd/kwok"
