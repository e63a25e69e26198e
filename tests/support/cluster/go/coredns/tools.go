//go:build tools

// Package tools names the DNS server that the tests build.
package tools

import _ "github.com/coredns/coredns"
