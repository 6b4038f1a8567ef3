# The study of `peers.py` by R's nlme and saemix: CPU seconds and estimates, one line each.
#
#     Rscript peers.R table.csv program seed
#
# Columns ID, TIME, DV; 320 mg at time 0. Lognormal ka, V, CL, diagonal variances, constant error;
# both programs start at ka 1, V 20, CL 5.

arguments <- commandArgs(TRUE)
data <- read.csv(arguments[1])
start <- log(c(ka = 1, V = 20, CL = 5))

by_nlme <- function() {
  library(nlme)
  concentration <<- deriv(  # nlme looks for it among the globals
    ~ 320 * exp(lka) / (exp(lV) * (exp(lka) - exp(lCL - lV))) *
      (exp(-exp(lCL - lV) * t) - exp(-exp(lka) * t)),
    c("lka", "lV", "lCL"), function(t, lka, lV, lCL) {}
  )
  begun <- proc.time()
  fit <- nlme(
    DV ~ concentration(TIME, lka, lV, lCL), data = groupedData(DV ~ TIME | ID, data),
    fixed = lka + lV + lCL ~ 1, random = pdDiag(lka + lV + lCL ~ 1),
    start = c(lka = start[[1]], lV = start[[2]], lCL = start[[3]])
  )
  seconds <- sum((proc.time() - begun)[1:2])
  c(seconds, exp(fixef(fit)), as.numeric(VarCorr(fit)[1:3, "StdDev"]), fit$sigma)
}

by_saemix <- function(seed) {
  suppressMessages(library(saemix))
  concentration <- function(psi, id, x) {
    t <- x[, 1]
    ka <- psi[id, 1]
    V <- psi[id, 2]
    k <- psi[id, 3] / V
    320 * ka / (V * (ka - k)) * (exp(-k * t) - exp(-ka * t))
  }
  begun <- proc.time()
  invisible(capture.output({
    table <- saemixData(data, name.group = "ID", name.predictors = "TIME", name.response = "DV")
    model <- saemixModel(
      concentration, psi0 = matrix(exp(start), 1, dimnames = list(NULL, c("ka", "V", "CL"))),
      transform.par = c(1, 1, 1), error.model = "constant"
    )
    control <- list(seed = seed, save = FALSE, save.graphs = FALSE, displayProgress = FALSE,
                    fim = FALSE, ll.is = FALSE, map = FALSE)
    fit <- saemix(model, table, control)
  }))
  seconds <- sum((proc.time() - begun)[1:2])
  found <- fit@results
  c(seconds, found@fixed.effects, sqrt(diag(found@omega)), found@respar[1])
}

values <- if (arguments[2] == "nlme") by_nlme() else by_saemix(as.integer(arguments[3]))
cat(format(values, digits = 10), "\n")
